"""What families with single-stream blocks have in common: Flux and HunyuanVideo."""
