"""Text and chat data: what a run trains, calibrates and is measured on. No torch here."""
