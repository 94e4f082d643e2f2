"""The bundled small model: its pictures, its training, its score."""
