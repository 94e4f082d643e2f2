"""The bundled small model: its images, its training, its score."""
