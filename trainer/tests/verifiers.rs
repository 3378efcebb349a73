//! The built-in verifiers that need no network.

use onpolicy_plugin_api::{Attempt, Options, Plugins, Problem, Score, Verifier};
use onpolicy_trainer::builtins;
use serde_json::{Value, json};

fn make(name: &str, options: Value) -> Result<Box<dyn Verifier>, String> {
    let Value::Object(options) = options else { panic!("options are an object") };
    let plugins = builtins::register(Plugins::default(), 0);
    plugins.make_verifier(name, &Options(options)).map_err(|e| e.to_string())
}

fn score(verifier: &dyn Verifier, answer: &str, completion: &str) -> Score {
    let problem = Problem { messages: Vec::new(), answer: answer.into() };
    let attempt = Attempt { problem: &problem, completion, truncated: false };
    let mut scores = verifier.verify(&[attempt]);
    assert_eq!(scores.len(), 1);
    scores.remove(0)
}

/// Checks completions that are right, and completions that are wrong.
fn check(name: &str, answer: &str, right: &[&str], wrong: &[&str]) {
    let verifier = make(name, json!({})).unwrap();
    for text in right {
        assert_eq!(score(&*verifier, answer, text), Score::Reward(1.0), "{name}: {text:?}");
    }
    for text in wrong {
        assert_eq!(score(&*verifier, answer, text), Score::Reward(0.0), "{name}: {text:?}");
    }
}

fn fails(name: &str, answer: &str) {
    let verifier = make(name, json!({})).unwrap();
    assert!(matches!(score(&*verifier, answer, "8"), Score::Failed(_)), "{name}: {answer}");
}

#[test]
fn last_integer() {
    let right = ["8", "3 + 5 = 8.", "It is **8**!", "5+3=8\n", "008", "8.0", "$8", "3-8"];
    let wrong = ["", "eight", "8 or 9", "18", "-8", "8.5", "0.8", "8 - 3 = 5", "8,000"];
    check("last_integer", "8", &right, &wrong);
    check("last_integer", "-5", &["= -5", "(-5)", "\u{2212}5.", "-$5"], &["3-5", "5", "3 - 5"]);
    check("last_integer", "1,200", &["1200", "1,200.", "1,200.00"], &["1,20", "1 200"]);
    let big = "987654321987654321987654321987654321987654321";
    check("last_integer", big, &[big], &[&big[1..]]);
    fails("last_integer", "eight");
    fails("last_integer", "8.5");
}

#[test]
fn gsm8k() {
    let right =
        ["so 3*4=12\n#### 12", "#### $12.00 in all 99", "12", "#### none, 12", "#### 5 #### 12"];
    check("gsm8k", "12", &right, &["#### 13 then 12", "12 13", ""]);
    check("gsm8k", "0.5", &["#### .5", "It is 0.50."], &["5"]);
    fails("gsm8k", "many");
}

#[test]
fn exact() {
    check("exact", "Paris", &["Paris", " Paris\n"], &["paris", "Paris.", ""]);
    let relaxed = make("exact", json!({"ignore_case": true})).unwrap();
    assert_eq!(score(&*relaxed, "Stra\u{df}e", "STRA\u{df}E"), Score::Reward(1.0));
    assert_eq!(score(&*relaxed, "Paris", "Pari"), Score::Reward(0.0));
}

#[test]
fn boxed() {
    let right = [
        "\\boxed{0.5}",
        "so \\boxed{ 1/2 }.",
        "\\boxed{\\frac{1}{2}}",
        "\\boxed{\\dfrac{2}{4}}",
        "\\boxed{3} no, \\boxed{.50}",
        "$\\boxed{\\text{0.5}}$",
        "\\boxed{1/2} and \\boxed{unfinished",
    ];
    check(
        "boxed",
        "0.5",
        &right,
        &["0.5", "\\boxed{0.5} \\boxed{5}", "\\boxed{}", "\\boxed{-1/2}"],
    );
    check("boxed", "-\\frac{3}{4}", &["\\boxed{-0.75}", "\\boxed{-3/4}"], &["\\boxed{0.75}"]);
    check(
        "boxed",
        "\\boxed{1,234}",
        &["\\boxed{1{,}234}", "\\boxed{\\$1234.}"],
        &["\\boxed{1.234}"],
    );
    let set = "\\left( 1, x^{2} \\right)";
    check("boxed", set, &["\\boxed{(1,x^{2})}"], &["\\boxed{(1,x^2)}", "\\boxed{(1,x^{3})}"]);
    check("boxed", "a}b", &[], &["\\boxed{a}b"]);
    check("boxed", "1/0", &["\\boxed{1/0}"], &["\\boxed{2/0}"]);
}

#[test]
fn countdown() {
    let right = [
        "3*7+12",
        "(7 * 3) + 12",
        "First 3+7=10.\n3 \u{d7} 7 + 12 = 33",
        "The answer is 12+7*3.",
        "**3*7+12**",
        "- 3*7+12",
        "3*7+12 - done",
        "<answer>12 + 3*7</answer> or 12*3",
        "\\boxed{3 \\times 7 + 12}",
    ];
    let wrong = [
        "33",
        "3*7+12+0",
        "3*7",
        "3*7+12 = 33\n1+1",
        "3*7+3*4",
        "37+12",
        "-3*7+12",
        "(3*7+12",
        "3*7+12)",
        "12/(3-3)+7",
        "",
    ];
    let goal = "{\"target\": 33, \"numbers\": [3, 7, 12]}";
    check("countdown", goal, &right, &wrong);
    let fractions = "{\"target\": 24, \"numbers\": [3, 3, 8, 8]}";
    check("countdown", fractions, &["8/(3-8/3)"], &["8/(3-8/3)*1"]);
    let deep = format!("{}1{}+1", "(".repeat(100_000), ")".repeat(100_000));
    let huge = format!("{}*{}", i64::MAX, i64::MAX);
    check("countdown", "{\"target\": 2, \"numbers\": [1, 1]}", &["1+1"], &[&deep, &huge]);
    fails("countdown", "33");
}

#[test]
fn options_are_checked() {
    for name in ["last_integer", "gsm8k", "boxed", "countdown", "exact"] {
        let refused = make(name, json!({"strict": true})).err().unwrap();
        assert!(refused.contains("unknown field `strict`"), "{refused}");
    }
    assert!(make("regex", json!({})).err().unwrap().contains("there are: boxed, countdown"));
}

/// Texts of all sorts must not make a verifier panic.
#[test]
fn random_texts_do_no_harm() {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let pieces = [
        "1",
        "23",
        ",",
        ".",
        "-",
        "\u{2212}",
        "$",
        "/",
        "(",
        ")",
        "{",
        "}",
        "\\boxed{",
        "\\frac{",
        "\\",
        "####",
        " ",
        "\n",
        "=",
        "*",
        "<answer>",
        "</answer>",
        "\u{e9}",
        "\u{d7}",
        "x",
        "000",
        "\u{1f600}",
        "\\text{",
    ];
    let names = ["last_integer", "gsm8k", "exact", "boxed", "countdown"];
    let verifiers: Vec<_> = names.iter().map(|name| make(name, json!({})).unwrap()).collect();
    let text = |rng: &mut rand_chacha::ChaCha8Rng| -> String {
        (0..rng.random_range(0..20)).map(|_| pieces[rng.random_range(0..pieces.len())]).collect()
    };
    for _ in 0..20_000 {
        let (completion, answer) = (text(&mut rng), text(&mut rng));
        for verifier in &verifiers {
            score(&**verifier, &answer, &completion);
            score(&**verifier, "{\"target\": 1, \"numbers\": [1, 23]}", &completion);
        }
    }
}
