"""Models on disk: read, rewritten, proved, packed, described and uploaded, without building them."""
