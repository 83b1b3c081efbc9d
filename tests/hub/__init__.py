"""Tests of the Hub: against a server on loopback that speaks its protocol to the unmodified client."""
