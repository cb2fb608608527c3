"""Whether the shipped demos begin at a merge-ready base."""
