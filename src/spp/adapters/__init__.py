"""SPP as a PEFT method, adapter files of every format, merging and converting them."""
