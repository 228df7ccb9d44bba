"""Pictures for public text-to-image benchmarks, laid out as their scorers read them (docs/text_to_image.md)."""
