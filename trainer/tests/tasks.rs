//! The built-in tasks: same problem for the same index, right answers, clean splits.

use onpolicy_plugin_api::{Message, Options, Plugins, Problem, TaskSource};
use onpolicy_trainer::builtins;
use serde_json::{Value, json};
use std::{collections::HashSet, fs, path::Path};

fn make_with_seed(seed: u64, name: &str, options: Value) -> Result<Box<dyn TaskSource>, String> {
    let Value::Object(options) = options else { panic!("options are an object") };
    let plugins = builtins::register(Plugins::default(), seed);
    plugins.make_task(name, &Options(options)).map_err(|e| e.to_string())
}

fn make(name: &str, options: Value) -> Box<dyn TaskSource> {
    make_with_seed(0, name, options).unwrap()
}

fn refusal(name: &str, options: Value) -> String {
    make_with_seed(0, name, options).err().expect("it should be refused")
}

fn question(problem: &Problem) -> &str {
    &problem.messages.last().unwrap().content
}

/// The formula of `What is FORMULA?`.
fn formula(problem: &Problem) -> &str {
    question(problem).strip_prefix("What is ").and_then(|q| q.strip_suffix('?')).unwrap()
}

#[test]
fn sums_are_worded_and_right() {
    let task = make("sum", json!({}));
    let mut seen = HashSet::new();
    for index in 0..2000 {
        let problem = task.train(index);
        let (a, b) = formula(&problem).split_once('+').unwrap();
        let (a, b): (u32, u32) = (a.parse().unwrap(), b.parse().unwrap());
        assert!(a < 10 && b < 10);
        assert_eq!(problem.messages, [Message::user(format!("What is {a}+{b}?"))]);
        assert_eq!(problem.answer, (a + b).to_string());
        seen.insert((a, b));
    }
    assert_eq!(seen.len(), 100, "every sum of two digits comes up");
}

#[test]
fn products_and_chains_are_right() {
    let task = make("product", json!({"digits": 9, "terms": 4}));
    for index in 0..100 {
        let problem = task.train(index);
        let factors: Vec<i128> = formula(&problem).split('*').map(|n| n.parse().unwrap()).collect();
        assert_eq!(factors.len(), 4);
        assert_eq!(problem.answer, factors.iter().product::<i128>().to_string());
    }
    let task = make("chain", json!({"digits": 2, "terms": 4}));
    let mut negative = 0;
    for index in 0..300 {
        let problem = task.train(index);
        let spaced = formula(&problem).replace('+', " +").replace('-', " -");
        let terms: Vec<i64> = spaced.split(' ').map(|n| n.parse().unwrap()).collect();
        assert_eq!(terms.len(), 4);
        assert_eq!(problem.answer, terms.iter().sum::<i64>().to_string());
        negative += usize::from(problem.answer.starts_with('-'));
    }
    assert!(negative > 30, "{negative} negative answers");
}

#[test]
fn problems_depend_on_seed_and_index_alone() {
    let options = || json!({"digits": 4});
    let (a, b) = (make("sum", options()), make("sum", options()));
    let other = make_with_seed(1, "sum", options()).unwrap();
    let named = make_with_seed(1, "sum", json!({"digits": 4, "seed": 0})).unwrap();
    let backwards: Vec<Problem> = (0..50).rev().map(|i| b.train(i)).collect();
    for (index, problem) in (0..50).zip(backwards.iter().rev()) {
        assert_eq!(a.train(index), *problem);
        assert_eq!(named.train(index), *problem, "the option goes before the run's seed");
        assert_ne!(other.train(index), *problem);
        assert_eq!(a.eval(index), other.eval(index), "every seed is judged by the same problems");
    }
    let distinct: HashSet<String> = (0..200).map(|i| question(&a.train(i)).to_owned()).collect();
    assert_eq!(distinct.len(), 200);
}

#[test]
fn held_out_problems_never_come_up_in_training() {
    let tasks = [
        ("sum", json!({"digits": 2})),
        ("product", json!({"digits": 2})),
        ("chain", json!({"digits": 1, "terms": 3})),
        ("countdown", json!({"numbers": 3})),
    ];
    // Terms that may change places do not make another problem.
    let key = |name: &str, problem: &Problem| match name {
        "chain" => question(problem).to_owned(),
        "countdown" => {
            let mut goal: Value = serde_json::from_str(&problem.answer).unwrap();
            goal["numbers"].as_array_mut().unwrap().sort_by_key(|n| n.as_i64());
            goal.to_string()
        }
        _ => {
            let mut terms: Vec<&str> = formula(problem).split(['+', '*']).collect();
            terms.sort_unstable();
            terms.join(" ")
        }
    };
    for (name, options) in tasks {
        let task = make(name, options);
        let train: HashSet<String> = (0..5000).map(|i| key(name, &task.train(i))).collect();
        let eval: HashSet<String> = (0..300).map(|i| key(name, &task.eval(i).unwrap())).collect();
        assert!(train.is_disjoint(&eval), "{name}");
        assert!(eval.len() > 50, "{name}: only {} held out", eval.len());
    }
    let small = make("sum", json!({}));
    let differ = (0..50).filter(|&i| Some(small.train(i)) != small.eval(i)).count();
    assert!(differ > 40, "a small space has another stream");
}

#[test]
fn countdown_problems_have_solutions_that_the_verifier_accepts() {
    let task = make("countdown", json!({"numbers": 3, "max_number": 9, "max_target": 50}));
    let verifier = builtins::register(Plugins::default(), 0)
        .make_verifier("countdown", &Options::default())
        .unwrap();
    for index in 0..60 {
        let problem = task.train(index);
        let goal: Value = serde_json::from_str(&problem.answer).unwrap();
        let numbers: Vec<i64> =
            goal["numbers"].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect();
        assert!(numbers.iter().all(|n| (1..=9).contains(n)));
        assert!((1..=50).contains(&goal["target"].as_i64().unwrap()));
        assert!(question(&problem).starts_with(&format!("Make {} from", goal["target"])));
        let right = candidates(&numbers).into_iter().any(|text| {
            let attempt = onpolicy_plugin_api::Attempt {
                problem: &problem,
                completion: &text,
                truncated: false,
            };
            verifier.verify(&[attempt]) == [onpolicy_plugin_api::Score::Reward(1.0)]
        });
        assert!(right, "no solution for {}", problem.answer);
    }
}

/// Every expression of three numbers.
fn candidates(n: &[i64]) -> Vec<String> {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let mut all = Vec::new();
    for [a, b, c] in orders.map(|order| order.map(|i| n[i])) {
        for x in ['+', '-', '*', '/'] {
            for y in ['+', '-', '*', '/'] {
                all.push(format!("({a}{x}{b}){y}{c}"));
                all.push(format!("{c}{y}({a}{x}{b})"));
            }
        }
    }
    all
}

#[test]
fn generator_options_are_checked() {
    assert!(refusal("sum", json!({"digits": 0})).contains("digits = 0 must be between 1 and 9"));
    assert!(refusal("sum", json!({"terms": 17})).contains("terms = 17"));
    assert!(refusal("product", json!({"terms": 5})).contains("between 2 and 4"));
    assert!(refusal("chain", json!({"digit": 1})).contains("unknown field `digit`"));
    assert!(refusal("countdown", json!({"max_number": 1})).contains("max_number = 1"));
    assert!(refusal("sum", json!({"prompt": "x"})).contains("{question}"));
    let wrapped = make("sum", json!({"prompt": "Q: {question} A:", "system": "Be brief."}));
    assert_eq!(wrapped.train(0).messages.len(), 2);
    assert!(question(&wrapped.train(0)).starts_with("Q: What is "));
}

// ---- JSONL --------------------------------------------------------------------------------

fn write(dir: &Path, name: &str, lines: &[String]) -> String {
    let path = dir.join(name);
    fs::write(&path, lines.join("\n")).unwrap();
    path.display().to_string()
}

fn lines(n: usize) -> Vec<String> {
    (0..n).map(|i| json!({"question": format!("q{i}"), "answer": i}).to_string()).collect()
}

fn questions(problems: impl Iterator<Item = Problem>) -> Vec<String> {
    problems.map(|p| question(&p).to_owned()).collect()
}

#[test]
fn a_file_is_reshuffled_each_time_round() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", &lines(50));
    let options = || json!({"path": path, "eval_share": 0.0});
    let task = make("jsonl", options());
    let epoch =
        |task: &dyn TaskSource, e: u64| questions((50 * e..50 * (e + 1)).map(|i| task.train(i)));
    let sorted = |mut q: Vec<String>| {
        q.sort();
        q
    };
    let (first, second) = (epoch(&*task, 0), epoch(&*task, 1));
    assert_ne!(first, second);
    assert_eq!(sorted(first.clone()), sorted((0..50).map(|i| format!("q{i}")).collect()));
    assert_eq!(sorted(second), sorted(first.clone()));
    assert_eq!(epoch(&*make("jsonl", options()), 0), first);
    assert_ne!(epoch(&*make_with_seed(1, "jsonl", options()).unwrap(), 0), first);
    assert_eq!(task.eval(0), None);
    let problem = (0..50).map(|i| task.train(i)).find(|p| question(p) == "q7").unwrap();
    assert_eq!(problem.answer, "7");
}

#[test]
fn a_share_is_held_out_by_question() {
    let dir = tempfile::tempdir().unwrap();
    let twice: Vec<String> = lines(40).into_iter().chain(lines(40)).collect();
    let path = write(dir.path(), "a.jsonl", &twice);
    let split = |seed: u64| {
        let task =
            make_with_seed(seed, "jsonl", json!({"path": path, "eval_share": 0.25})).unwrap();
        let eval = questions((0..).map_while(|i| task.eval(i)));
        let train: HashSet<String> =
            questions((0..60).map(|i| task.train(i))).into_iter().collect();
        (eval, train)
    };
    let (eval, train) = split(0);
    assert_eq!((eval.len(), train.len()), (20, 30), "ten questions, each twice");
    assert!(eval.iter().all(|q| !train.contains(q)));
    assert_eq!(split(5).0, eval, "every seed holds out the same");
    let whole = make("jsonl", json!({"path": path}));
    assert_eq!((0..).map_while(|i| whole.eval(i)).count(), 8, "a tenth by default");
}

#[test]
fn gsm8k_answers_other_fields_and_a_file_for_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let train = json!({"q": "How much?", "a": "3 * 400 = 1,200\n#### 1,200"}).to_string();
    let test = json!({"q": "held", "a": -1.5}).to_string();
    let path = write(dir.path(), "a.jsonl", &[format!("\u{feff}{train}"), String::new()]);
    let eval_path = write(dir.path(), "b.jsonl", &[test]);
    let options = json!({
        "path": path, "eval_path": eval_path, "question": "q", "answer": "a", "system": "S"
    });
    let task = make("jsonl", options);
    assert_eq!(task.train(3).answer, "1200");
    assert_eq!(task.train(3).messages.len(), 2);
    assert_eq!(task.eval(0).unwrap().answer, "-1.5");
    assert_eq!(task.eval(1), None);
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = json!({"question": "q", "answer": "a"}).to_string();
    let about = |bad: &str| {
        let path = write(dir.path(), "bad.jsonl", &[good.clone(), bad.to_owned(), good.clone()]);
        refusal("jsonl", json!({"path": path}))
    };
    assert!(about("{oops").contains("bad.jsonl line 2: not a JSON object"));
    assert!(about("[1]").contains("line 2: not a JSON object"));
    let missing = about("{\"question\": \"q\", \"reply\": 1}");
    assert!(missing.contains("line 2: no field 'answer'; there are: question, reply"), "{missing}");
    assert!(about("{\"question\": \"\", \"answer\": 1}").contains("field 'question' is empty"));
    assert!(about("{\"question\": \"q\", \"answer\": [1]}").contains("neither a string"));
    assert!(
        about("{\"question\": \"q\", \"answer\": \"x ####\"}").contains("no answer after ####")
    );
    let path = dir.path().join("latin.jsonl");
    fs::write(&path, [good.as_bytes(), b"\n\"\xe9\"\n"].concat()).unwrap();
    let path = path.display().to_string();
    assert!(refusal("jsonl", json!({"path": path})).contains("line 2: not UTF-8"));

    let empty = write(dir.path(), "empty.jsonl", &[" ".into(), String::new()]);
    assert!(refusal("jsonl", json!({"path": empty})).contains("holds no problems"));
    assert!(refusal("jsonl", json!({"path": "/nowhere"})).contains("cannot read /nowhere"));
    assert!(refusal("jsonl", json!({})).contains("missing field `path`"));
    let one = write(dir.path(), "one.jsonl", &lines(1));
    assert!(refusal("jsonl", json!({"path": one})).contains("cannot be split"));
    assert!(refusal("jsonl", json!({"path": one, "eval_share": 1.0})).contains("eval_share = 1"));
    let both = json!({"path": one, "eval_share": 0.1, "eval_path": one});
    assert!(refusal("jsonl", both).contains("exclude each other"));
}
