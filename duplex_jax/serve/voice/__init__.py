"""Speech in and out: voice activity, recognition in slices, and speaking slices smoothly."""
