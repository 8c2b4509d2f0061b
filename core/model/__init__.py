"""One decoder for all families, built from a Hugging Face config."""
