"""SPP as a PEFT method; reading, merging and converting adapter files."""
