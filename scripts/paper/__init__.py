"""What the paper's figures show, found with clipq."""
