"""Membership, planning, deployment and the HTTP gateway. Imports no backend."""
