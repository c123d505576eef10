"""A headless Chromium, driven through the pipe of its own protocol.

The protocol is JSON with a zero byte after each message, on the file
descriptors 3 and 4 of the browser, so nothing but the browser is needed.
"""
import base64
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
# Events that say that a page is not as it should be, or asks for more.
COMPLAINTS = ('Log.entryAdded', 'Runtime.exceptionThrown',
              'Runtime.consoleAPICalled')


def find_browser():
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; a context manager.

    Attributes:
        complaints: events of the console: errors, warnings and messages.
        requests: addresses that the pages have asked for.
    """

    def __init__(self, path, profile):
        self.complaints, self.requests = [], []
        self._number, self._rest, self._waiting = 0, b'', []
        their_read, self._write = os.pipe()
        self._read, their_write = os.pipe()

        def place():
            # Duplicates above them first: they may be 3 and 4 themselves.
            pair = [os.dup(their_read), os.dup(their_write)]
            while min(pair) < 5:
                pair = [os.dup(one) for one in pair]
            os.dup2(pair[0], 3)
            os.dup2(pair[1], 4)

        self._process = subprocess.Popen([
            path, '--headless=new', '--no-sandbox', '--disable-gpu',
            '--disable-dev-shm-usage', '--disable-background-networking',
            '--no-first-run', '--hide-scrollbars', '--remote-debugging-pipe',
            f'--user-data-dir={profile}', 'about:blank'
        ],
                                         stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL,
                                         close_fds=False,
                                         start_new_session=True,
                                         preexec_fn=place)
        os.close(their_read)
        os.close(their_write)
        target = self._call('Target.createTarget', None, url='about:blank')
        attached = self._call(
            'Target.attachToTarget',
            None,
            targetId=target['targetId'],
            flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self._write)
        os.close(self._read)
        # The browser has processes of its own.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, method, **params):
        """Call a method of the protocol for the page; its result."""
        return self._call(method, self._session, **params)

    def _call(self, method, session, **params):
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        if session is not None:
            message['sessionId'] = session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._number:
                assert 'error' not in answer, (method, answer['error'])
                return answer['result']
            self._note(answer)

    def _next(self):
        while b'\0' not in self._rest:
            more = os.read(self._read, 2**20)
            assert more, 'the browser has ended'
            self._rest += more
        message, self._rest = self._rest.split(b'\0', 1)
        return json.loads(message)

    def _note(self, event):
        method = event.get('method')
        if method in COMPLAINTS:
            self.complaints.append(event['params'])
        elif method == 'Network.requestWillBeSent':
            self.requests.append(event['params']['request']['url'])
        elif method == 'Page.loadEventFired':
            self._waiting.append(method)

    def open(self, path, width=1280, height=900, dark=False):
        """Show a file, in a window of this size."""
        self._waiting.clear()
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700)
        scheme = 'dark' if dark else 'light'
        self.call(
            'Emulation.setEmulatedMedia',
            features=[dict(name='prefers-color-scheme', value=scheme)])
        self.call('Page.navigate', url=Path(path).absolute().as_uri())
        while not self._waiting:
            self._note(self._next())

    def run(self, script):
        """The value of an expression of JavaScript in the page."""
        found = self.call(
            'Runtime.evaluate', expression=script, returnByValue=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def picture(self, path, whole=False):
        """Write what the page looks like as a PNG file."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot['data']))
