"""Text that the three scripts read: prompts, questions, and what code can check."""
