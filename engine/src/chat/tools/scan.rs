//! JSON that arrives in pieces: where a value ends, and what stands before a call's arguments.

/// Follows the nesting of objects and lists through text that comes in pieces.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Inside one object or list.
    pub fn inside() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Goes through `text`; where the outermost object or list ends in it, in bytes.
    pub fn end(&mut self, text: &str) -> Option<usize> {
        text.bytes().position(|byte| self.closes(byte)).map(|at| at + 1)
    }

    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// What the beginning of a call's object says.
#[derive(Debug, Clone, PartialEq)]
pub enum Head {
    /// Not enough has come.
    More,
    /// It is no call.
    Bad,
    /// The name, and where the arguments, an object, begin.
    Open { name: String, arguments: usize },
    /// All of it: name, arguments, and where the call's object ends.
    Whole { name: String, arguments: String, end: usize },
}

/// Why there is no value.
enum Lack {
    More,
    Bad,
}

impl From<Lack> for Head {
    fn from(lack: Lack) -> Self {
        match lack {
            Lack::More => Head::More,
            Lack::Bad => Head::Bad,
        }
    }
}

/// Reads the beginning of a call's object, `{"name": ..., "arguments": {`.
pub fn head(text: &str) -> Head {
    Reader { text, at: 0 }.head().unwrap_or_else(Head::from)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn head(&mut self) -> Result<Head, Lack> {
        let (mut name, mut arguments) = (None, None);
        self.expect(b'{')?;
        loop {
            let key = self.string()?;
            self.expect(b':')?;
            match (key.as_str(), self.peek()?) {
                ("name", b'"') => name = Some(self.string()?),
                ("arguments" | "parameters", b'{') => match name {
                    Some(name) => return Ok(Head::Open { name, arguments: self.at }),
                    None => arguments = Some(self.object()?.to_string()),
                },
                // Some models write the arguments as JSON in a string.
                ("arguments" | "parameters", b'"') => arguments = Some(self.string()?),
                ("arguments" | "parameters", b'n') => {
                    self.word("null")?;
                    arguments = Some("{}".into());
                }
                ("type" | "id", b'"') => {
                    self.string()?;
                }
                _ => return Err(Lack::Bad),
            }
            match self.next()? {
                b',' => {}
                b'}' => break,
                _ => return Err(Lack::Bad),
            }
        }
        let name = name.ok_or(Lack::Bad)?;
        let arguments = arguments.unwrap_or_else(|| "{}".into());
        Ok(Head::Whole { name, arguments, end: self.at })
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// The next byte that is no white space.
    fn peek(&mut self) -> Result<u8, Lack> {
        self.at += self.rest().len() - self.rest().trim_start().len();
        self.rest().bytes().next().ok_or(Lack::More)
    }

    /// Takes the next byte that is no white space, which is ASCII in a call's object.
    fn next(&mut self) -> Result<u8, Lack> {
        let byte = self.peek()?;
        if !byte.is_ascii() {
            return Err(Lack::Bad);
        }
        self.at += 1;
        Ok(byte)
    }

    fn expect(&mut self, byte: u8) -> Result<(), Lack> {
        if self.next()? == byte { Ok(()) } else { Err(Lack::Bad) }
    }

    fn word(&mut self, word: &str) -> Result<(), Lack> {
        match self.rest() {
            rest if rest.starts_with(word) => {
                self.at += word.len();
                Ok(())
            }
            rest if word.starts_with(rest) => Err(Lack::More),
            _ => Err(Lack::Bad),
        }
    }

    fn string(&mut self) -> Result<String, Lack> {
        if self.peek()? != b'"' {
            return Err(Lack::Bad);
        }
        let mut escaped = false;
        let end = self.rest()[1..].bytes().position(|byte| {
            let closes = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            closes
        });
        let quoted = &self.rest()[..end.ok_or(Lack::More)? + 2];
        self.at += quoted.len();
        serde_json::from_str(quoted).map_err(|_| Lack::Bad)
    }

    fn object(&mut self) -> Result<&'a str, Lack> {
        let end = Nesting::default().end(self.rest()).ok_or(Lack::More)?;
        let object = &self.rest()[..end];
        self.at += end;
        Ok(object)
    }
}
