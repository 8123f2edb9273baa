"""What measures, shows, and compares: nothing here is needed to train."""
