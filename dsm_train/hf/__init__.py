"""The format of weights: a Hugging Face folder, in and out. Imports neither megatron nor transformers."""
