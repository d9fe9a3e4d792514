"""Multi-head latent attention (MLA) over quantized pages: a latent that is key and value, and a rotary key beside it."""
