"""Tests of peft_aso.attribution, one file for each of its files."""
