//! As much of QEMU's monitor protocol (QMP) as xl needs to see a device model that runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::{Value, json};

/// The longest command that is read, in bytes.
const LONGEST: u64 = 64 << 10;
/// The version of QEMU whose monitor this resembles; xl looks at it to choose its commands.
const RESEMBLES: [u8; 3] = [7, 2, 0];

/// Answers one client after the other, until one says `quit` or the socket fails.
pub(super) fn serve(listener: &UnixListener) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => match converse(&stream) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::debug!("a client of the monitor: {error}"),
            },
            Err(error) => {
                tracing::warn!("the monitor: {error}");
                return;
            }
        }
    }
}

/// One conversation; true where it ended with `quit`.
fn converse(stream: &UnixStream) -> std::io::Result<bool> {
    let mut output = stream;
    let mut say = |value: &Value| writeln!(output, "{value}\r");
    let [major, minor, micro] = RESEMBLES;
    let version = json!({ "qemu": { "major": major, "minor": minor, "micro": micro }, "package": "vbd" });
    say(&json!({ "QMP": { "version": version, "capabilities": [] } }))?;
    let mut input = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if input.by_ref().take(LONGEST).read_line(&mut line)? == 0 {
            return Ok(false);
        }
        if line.trim().is_empty() {
            continue;
        }
        let (mut answer, quits) = answer(&line, &version);
        if let (Ok(command), Some(fields)) = (serde_json::from_str::<Value>(&line), answer.as_object_mut())
            && let Some(id) = command.get("id")
        {
            fields.insert("id".to_owned(), id.clone());
        }
        say(&answer)?;
        if quits {
            return Ok(true);
        }
    }
}

/// The answer to a command, and whether it ends this process.
fn answer(line: &str, version: &Value) -> (Value, bool) {
    let error = |class: &str, text: String| json!({ "error": { "class": class, "desc": text } });
    let Ok(command) = serde_json::from_str::<Value>(line) else {
        return (error("GenericError", "this is no JSON on one line".to_owned()), false);
    };
    let name = command.get("execute").and_then(Value::as_str).unwrap_or_default();
    let value = match name {
        "query-status" => json!({ "status": "running", "singlestep": false, "running": true }),
        "query-version" => version.clone(),
        // The disks are vbd's and not here to be stopped or changed: the domain's state says enough.
        "qmp_capabilities"
        | "stop"
        | "cont"
        | "quit"
        | "xen-set-global-dirty-log"
        | "xen-save-devices-state"
        | "xen-load-devices-state" => json!({}),
        "query-vnc" => json!({ "enabled": false }),
        "query-chardev" => json!([]),
        _ => {
            let text = format!("vbd has no devices for `{}`", name.escape_debug());
            return (error("CommandNotFound", text), false);
        }
    };
    (json!({ "return": value }), name == "quit")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says these lines and gives what was answered to each, after the greeting.
    fn talk(lines: &[&str]) -> (Vec<Value>, bool) {
        let (client, server) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn(move || converse(&server).unwrap());
        let mut answers = BufReader::new(client.try_clone().unwrap()).lines();
        let mut next = || serde_json::from_str::<Value>(&answers.next().unwrap().unwrap()).unwrap();
        assert_eq!(next()["QMP"]["version"]["qemu"]["major"], 7);
        let mut output = &client;
        let answers = lines.iter().map(|line| {
            writeln!(output, "{line}").unwrap();
            next()
        });
        let answers = answers.collect();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        (answers, serving.join().unwrap())
    }

    #[test]
    fn xl_sees_a_device_model_that_runs() {
        let commands = [
            r#"{"execute":"qmp_capabilities","id":1}"#,
            r#"{"execute":"query-status","id":42}"#,
            r#"{"execute":"change-vnc-password","id":"x"}"#,
            "nonsense",
        ];
        let (answers, quit) = talk(&commands);
        assert_eq!(answers[0], json!({ "return": {}, "id": 1 }));
        assert_eq!(answers[1]["return"]["status"], "running");
        assert_eq!(answers[1]["id"], 42);
        assert_eq!(
            (&answers[2]["error"]["class"], &answers[2]["id"]),
            (&json!("CommandNotFound"), &json!("x"))
        );
        assert_eq!(answers[3]["error"]["class"], "GenericError");
        assert!(!quit);
        assert!(talk(&[r#"{"execute":"quit"}"#]).1);
    }
}
