"""Breaking runs on purpose: workers, nodes and drivers killed at random moments, under every launcher that runs here."""
