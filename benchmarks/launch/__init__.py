"""What training on scattered machines moves, and what it takes when they come and go."""
