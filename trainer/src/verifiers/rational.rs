//! Exact fractions of two 128-bit integers. An operation that overflows gives `None`.

use super::number::Decimal;

/// A reduced fraction; the denominator is positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    /// `numerator / denominator`; `None` if the denominator is 0 or the fraction overflows.
    pub fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 {
            return None;
        }
        let (mut a, mut b) = (numerator, denominator);
        while b != 0 {
            (a, b) = (b, a.checked_rem(b)?);
        }
        let divisor = if (a < 0) == (denominator < 0) { a } else { a.checked_neg()? };
        Some(Self {
            numerator: numerator.checked_div(divisor)?,
            denominator: denominator.checked_div(divisor)?,
        })
    }

    /// A decimal number; `None` if it has too many digits.
    pub fn from_decimal(decimal: &Decimal) -> Option<Self> {
        let (integer, fraction) =
            decimal.as_str().split_once('.').unwrap_or((decimal.as_str(), ""));
        let denominator = 10_i128.checked_pow(fraction.len().try_into().ok()?)?;
        Self::new(format!("{integer}{fraction}").parse().ok()?, denominator)
    }

    /// The sum.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Self::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    /// The difference.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.checked_add(Self { numerator: other.numerator.checked_neg()?, ..other })
    }

    /// The product.
    pub fn checked_mul(self, other: Self) -> Option<Self> {
        let numerator = self.numerator.checked_mul(other.numerator)?;
        Self::new(numerator, self.denominator.checked_mul(other.denominator)?)
    }

    /// The quotient; `None` also if `other` is 0.
    pub fn checked_div(self, other: Self) -> Option<Self> {
        self.checked_mul(Self::new(other.denominator, other.numerator)?)
    }
}

impl From<i64> for Rational {
    fn from(value: i64) -> Self {
        Self { numerator: value.into(), denominator: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verifiers::number;

    fn fraction(numerator: i128, denominator: i128) -> Rational {
        Rational::new(numerator, denominator).unwrap()
    }

    #[test]
    fn fractions_are_reduced_with_the_sign_on_top() {
        assert_eq!(fraction(2, -4), fraction(-1, 2));
        assert_eq!(fraction(-3, -6), fraction(1, 2));
        assert_eq!(fraction(0, -7), Rational::from(0));
        assert_eq!(fraction(-8, 4), Rational::from(-2));
        assert_eq!(Rational::new(1, 0), None);
        assert_eq!(Rational::new(i128::MIN, -1), None);
    }

    #[test]
    fn arithmetic_is_exact() {
        let (third, half) = (fraction(1, 3), fraction(1, 2));
        assert_eq!(third.checked_add(half), Rational::new(5, 6));
        assert_eq!(third.checked_sub(half), Rational::new(-1, 6));
        assert_eq!(third.checked_mul(half), Rational::new(1, 6));
        assert_eq!(third.checked_div(half), Rational::new(2, 3));
        assert_eq!(third.checked_div(Rational::from(0)), None);
        assert_eq!(fraction(i128::MAX, 1).checked_add(Rational::from(1)), None);
    }

    #[test]
    fn decimals() {
        let of = |text: &str| Rational::from_decimal(&number::parse(text).unwrap());
        assert_eq!(of("-0.25"), Rational::new(-1, 4));
        assert_eq!(of("1,000"), Rational::new(1000, 1));
        assert_eq!(of(&"9".repeat(60)), None);
    }
}
