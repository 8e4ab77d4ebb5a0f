"""Flat parameter buffers, the one-state RMSProp, AdamW and the fp32 moving average."""
