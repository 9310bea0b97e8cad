"""Speech: voice activity detection, recognition in slices, and smooth synthesis of slices."""
