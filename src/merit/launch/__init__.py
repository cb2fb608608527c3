"""Where branches run. Each module here starts commands somewhere and waits for them, whatever they do."""
