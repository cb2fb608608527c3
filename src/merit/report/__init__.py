"""Everything that a person reads: progress, tables, pages."""
