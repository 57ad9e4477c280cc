"""Text to positions: tokenizers, documents, annotated positions, prompts. Knows no model."""
