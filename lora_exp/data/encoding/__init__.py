"""Turns documents into rows of tokens: encoding, packing, splitting, and the files of rows."""
