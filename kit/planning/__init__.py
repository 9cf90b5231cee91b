"""What a run will need, found before anything is loaded."""
