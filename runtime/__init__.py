"""What a run needs around it: ranks, checkpoints, folders of Hugging Face, memory, tokenizer, logs."""
