"""How results are written: pages, tables, and with what they were made."""
