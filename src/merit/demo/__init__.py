"""The embedded default: a tiny pretrained base and a generated mixture, so that the main job runs offline at once."""
