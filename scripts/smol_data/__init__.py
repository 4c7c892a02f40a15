"""What `scripts/make_smol_data.py` makes the embedded default's data from."""
