"""`spp run`: prune, fine-tune, merge, verify, evaluate and report, in one resumable run."""
