"""Which weights go: one file per criterion, and the table of them."""
