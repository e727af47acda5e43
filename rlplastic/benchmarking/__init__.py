"""What `rlplastic.bench` measures, one file per subject: rows of numbers, and what they mean."""
