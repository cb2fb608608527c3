"""Where branches run. Each module here starts commands somewhere and waits for them; none knows what training is."""
