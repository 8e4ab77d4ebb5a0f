"""The MMDiT, its discriminator, codecs and text encoders."""
