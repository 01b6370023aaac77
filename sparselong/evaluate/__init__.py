"""What compression and fine-tuning did to the model: accuracy and perplexity against the base."""
