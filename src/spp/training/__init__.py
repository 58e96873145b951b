"""Fine-tuning with SPP: data, teacher, Trainer, checkpoints."""
