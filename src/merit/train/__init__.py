"""Fine-tuning one branch."""
