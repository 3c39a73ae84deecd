"""Set-up for docker-compose.yml: a federation in containers on one machine."""
