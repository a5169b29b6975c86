//! Container logs: what is asked for, and which bytes of a log file answer it.
//!
//! A log file is lines of `<RFC 3339 time> <stdout|stderr> <P|F>[:tag] <bytes>`; `P` is a part of a line, `F` its end.
//! The tunnel reads the file and feeds the bytes; nothing here opens it.
//!
//! Source: kubernetes/kubernetes, pkg/kubelet/kuberuntime/logs/logs.go; kubernetes/cri-api docs on the log format.

use jiff::{SignedDuration, Timestamp};

/// Longest line of a log file that is read; the runtime splits at 16 KiB. The rest of a longer one is skipped.
pub const LINE_LEN_MAX: usize = 128 * 1024;

/// Whose log is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTarget {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Name of the container.
    pub container: String,
}

/// Which part of a log is asked for, and in what form.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Wait for more.
    pub follow: bool,
    /// Of the instance before the current one.
    pub previous: bool,
    /// With the time before each line.
    pub timestamps: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// Only what was written at or after this time.
    pub since: Option<Timestamp>,
    /// End after this many bytes.
    pub limit_bytes: Option<u64>,
    /// Only `stdout` or `stderr`.
    pub stream: Option<String>,
}

/// Why a request for a log cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogQueryError {
    /// Not a path of this API.
    #[error("`{0}` is not /containerLogs/<namespace>/<pod>/<container>")]
    Path(String),
    /// A parameter that is not what its name says.
    #[error("parameter {name}=`{value}` is not {expected}")]
    Parameter {
        /// Name of the parameter.
        name: String,
        /// As sent.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl LogTarget {
    /// Reads a decoded path.
    ///
    /// # Errors
    ///
    /// [`LogQueryError::Path`] when it is another path.
    pub fn parse(path: &str) -> Result<Self, LogQueryError> {
        let segments: Vec<_> = path.split('/').collect();
        match segments.as_slice() {
            ["", "containerLogs", namespace, pod, container]
                if ![namespace, pod, container].iter().any(|segment| segment.is_empty()) =>
            {
                let (namespace, pod, container) =
                    ((*namespace).into(), (*pod).into(), (*container).into());
                Ok(Self { namespace, pod, container })
            }
            _ => Err(LogQueryError::Path(path.into())),
        }
    }
}

impl LogOptions {
    /// Reads a raw query; unknown parameters are ignored, `now` is what `sinceSeconds` counts from.
    ///
    /// # Errors
    ///
    /// [`LogQueryError::Parameter`] when a known parameter has a bad value.
    pub fn parse(query: &str, now: Timestamp) -> Result<Self, LogQueryError> {
        let mut options = Self::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, "true"));
            let (name, value) = (decoded(name), decoded(value));
            let bad = |expected| LogQueryError::Parameter {
                name: name.clone(),
                value: value.clone(),
                expected,
            };
            let flag = || match value.as_str() {
                "true" | "1" | "True" | "t" => Ok(true),
                "false" | "0" | "False" | "f" | "" => Ok(false),
                _ => Err(bad("true or false")),
            };
            let number = || value.parse::<u64>().map_err(|_| bad("a number of 0 or more"));
            match name.as_str() {
                "follow" => options.follow = flag()?,
                "previous" => options.previous = flag()?,
                "timestamps" => options.timestamps = flag()?,
                "tailLines" => options.tail_lines = Some(number()?),
                "limitBytes" => options.limit_bytes = Some(number()?),
                "sinceSeconds" => {
                    let ago =
                        SignedDuration::from_secs(i64::try_from(number()?).unwrap_or(i64::MAX));
                    options.since = Some(now.checked_sub(ago).unwrap_or(Timestamp::MIN));
                }
                "sinceTime" => {
                    options.since = Some(value.parse().map_err(|_| bad("an RFC 3339 time"))?);
                }
                "stream" => match value.as_str() {
                    "All" | "" => {}
                    "Stdout" => options.stream = Some("stdout".into()),
                    "Stderr" => options.stream = Some("stderr".into()),
                    _ => return Err(bad("All, Stdout or Stderr")),
                },
                _ => {}
            }
        }
        Ok(options)
    }
}

/// Turns bytes of a log file into bytes of an answer.
#[derive(Debug)]
pub struct LogReader {
    options: LogOptions,
    unfinished: Vec<u8>,
    skipping: bool,
    line_begins: bool,
    written: u64,
}

impl LogReader {
    /// Begins at a line.
    pub fn new(options: LogOptions) -> Self {
        Self { options, unfinished: Vec::new(), skipping: false, line_begins: true, written: 0 }
    }

    /// Whether `limitBytes` is reached.
    pub fn is_done(&self) -> bool {
        self.options.limit_bytes.is_some_and(|limit| self.written >= limit)
    }

    /// Takes the next bytes of the file and appends what they say to `answer`.
    pub fn read(&mut self, mut bytes: &[u8], answer: &mut Vec<u8>) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            if !std::mem::take(&mut self.skipping) {
                let mut line = std::mem::take(&mut self.unfinished);
                line.extend_from_slice(head);
                self.read_line(&line, answer);
            }
            bytes = rest;
        }
        if self.unfinished.len() + bytes.len() > LINE_LEN_MAX {
            self.unfinished.clear();
            self.skipping = true;
        } else if !self.skipping {
            self.unfinished.extend_from_slice(bytes);
        }
    }

    fn read_line(&mut self, line: &[u8], answer: &mut Vec<u8>) {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let (Some(time), Some(stream), Some(tag)) = (fields.next(), fields.next(), fields.next())
        else {
            return; // torn by a power cut
        };
        let text = fields.next().unwrap_or_default();
        let partial = match tag.split(|byte| *byte == b':').next() {
            Some(b"P") => true,
            Some(b"F") => false,
            _ => return,
        };
        let Some(written_at) =
            std::str::from_utf8(time).ok().and_then(|time| time.parse::<Timestamp>().ok())
        else {
            return;
        };
        let other_stream =
            self.options.stream.as_ref().is_some_and(|wanted| wanted.as_bytes() != stream);
        if other_stream || self.options.since.is_some_and(|since| written_at < since) {
            return;
        }
        let begins = std::mem::replace(&mut self.line_begins, !partial);
        if self.options.timestamps && begins {
            self.write(time, answer);
            self.write(b" ", answer);
        }
        self.write(text, answer);
        if !partial {
            self.write(b"\n", answer);
        }
    }

    fn write(&mut self, bytes: &[u8], answer: &mut Vec<u8>) {
        let room = self.options.limit_bytes.map_or(u64::MAX, |limit| limit - self.written);
        let take = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        answer.extend_from_slice(&bytes[..take]);
        self.written += take as u64;
    }
}

/// Finds where the last lines of a file begin, from blocks read backwards.
#[derive(Debug)]
pub struct Tail {
    lines: u64,
    at_end: bool,
}

impl Tail {
    /// Looks for the last `lines` lines.
    pub fn new(lines: u64) -> Self {
        Self { lines, at_end: true }
    }

    /// Takes the block that ends where the last one began (the first one ends the file); `offset` is where it begins.
    /// Returns where to read from, once that is known; when the whole file was seen without, read all of it.
    pub fn handle_block(&mut self, block: &[u8], offset: u64) -> Option<u64> {
        let end = offset + block.len() as u64;
        if self.lines == 0 {
            return Some(end);
        }
        for (at, byte) in block.iter().enumerate().rev() {
            // The line feed that ends the file begins no line.
            if !std::mem::replace(&mut self.at_end, false) && *byte == b'\n' {
                self.lines -= 1;
                if self.lines == 0 {
                    return Some(offset + at as u64 + 1);
                }
            }
        }
        None
    }
}

/// Undoes percent encoding; a broken escape stays as it is.
pub(crate) fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], escape.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "2026-11-22T16:00:00.000000001Z stdout F one\n\
        2026-11-22T16:00:01Z stderr F two\n\
        2026-11-22T16:00:02Z stdout P thr\n\
        2026-11-22T16:00:02Z stdout F ee\n\
        torn line\n\
        2026-11-22T16:00:03Z stdout F:tag four words here now\n";

    fn now() -> Timestamp {
        "2026-11-22T16:00:04Z".parse().expect("a time")
    }

    fn check(query: &str, expected: &str) {
        let options = LogOptions::parse(query, now()).expect(query);
        let mut start = 0;
        if let Some(lines) = options.tail_lines {
            let mut tail = Tail::new(lines);
            let mut end = FILE.len();
            while end > 0 {
                let begin = end.saturating_sub(7);
                if let Some(found) = tail.handle_block(&FILE.as_bytes()[begin..end], begin as u64) {
                    start = found as usize;
                    break;
                }
                end = begin;
            }
        }
        let mut reader = LogReader::new(options);
        let mut answer = Vec::new();
        for chunk in FILE.as_bytes()[start..].chunks(5) {
            reader.read(chunk, &mut answer);
        }
        assert_eq!(String::from_utf8_lossy(&answer), expected, "{query}");
    }

    #[test]
    fn whole_log_joins_partial_lines_and_skips_torn_ones() {
        check("", "one\ntwo\nthree\nfour words here now\n");
    }

    #[test]
    fn options_select_and_decorate() {
        check("tailLines=1", "four words here now\n");
        check("tailLines=0", "");
        check("tailLines=100", "one\ntwo\nthree\nfour words here now\n");
        check("sinceSeconds=2", "three\nfour words here now\n");
        check("sinceTime=2026-11-22T16%3A00%3A03Z", "four words here now\n");
        check("limitBytes=6", "one\ntw");
        check("stream=Stderr", "two\n");
        check(
            "timestamps=true&sinceSeconds=2",
            "2026-11-22T16:00:02Z three\n2026-11-22T16:00:03Z four words here now\n",
        );
    }

    #[test]
    fn bad_requests_are_named() {
        let error = LogOptions::parse("tailLines=-1", now()).expect_err("negative");
        assert_eq!(error.to_string(), "parameter tailLines=`-1` is not a number of 0 or more");
        assert!(LogOptions::parse("sinceTime=yesterday", now()).is_err());
        assert!(LogTarget::parse("/containerLogs/default/web").is_err());
        assert!(LogTarget::parse("/exec/default/web/c").is_err());
        let target = LogTarget::parse("/containerLogs/default/web-0/c").expect("a target");
        assert_eq!((target.pod.as_str(), target.container.as_str()), ("web-0", "c"));
    }

    #[test]
    fn endless_line_does_not_fill_the_memory() {
        let mut reader = LogReader::new(LogOptions::default());
        let mut answer = Vec::new();
        for _ in 0..100 {
            reader.read(&[b'x'; 10_000], &mut answer);
            assert!(reader.unfinished.len() <= LINE_LEN_MAX);
        }
        reader.read(b"\n2026-11-22T16:00:00Z stdout F next\n", &mut answer);
        assert_eq!(answer, b"next\n");
    }

    proptest! {
        #[test]
        fn mangled_files_and_queries_never_panic(bytes: Vec<u8>, query in "\\PC{0,40}") {
            let options = LogOptions::parse(&query, now()).unwrap_or_default();
            LogReader::new(options).read(&bytes, &mut Vec::new());
        }
    }
}
