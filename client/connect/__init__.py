"""How a site's machine joins a federation: link, worker and the check of the code that it runs. Stays at home."""
