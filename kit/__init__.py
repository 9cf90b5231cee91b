"""Fine-tune video diffusion transformers that make characters talk. Importing does nothing else."""
