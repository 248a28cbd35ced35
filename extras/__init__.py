"""What may be deleted: it makes the three scripts fast or comfortable, and changes no result."""
