"""What docker-compose.yml needs: the federation of three containers on one machine."""
