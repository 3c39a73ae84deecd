"""The protocol between server and site: messages, wire format, factors, versions, digests."""
