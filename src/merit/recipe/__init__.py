"""The recipe: its settings (schema) and its files (load)."""
