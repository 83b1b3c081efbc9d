"""Tests of peft_aso; the folders mirror the package."""
